"""The engine around the methods: order, inputs, passes, merge, cut, folder and proof."""
