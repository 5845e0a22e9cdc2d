"""``python -m distcl`` is the ``distcl`` command."""

from distcl.cli.app import main

if __name__ == "__main__":
    main()
