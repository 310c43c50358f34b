"""The commands, each with its options, its checks of them and what it prints."""
