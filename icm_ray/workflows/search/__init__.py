"""From a search's recipe to the best merge, proven."""
