"""What methods may know beside the adapters: how it is gathered, and how it lies on disk."""
