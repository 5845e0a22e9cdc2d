"""What each command of ``distcl`` does; ``distcl.cli`` puts them together."""
