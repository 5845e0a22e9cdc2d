"""What each command of ``distcl`` does; ``distcl.cli.app`` puts them together."""
