"""`python -m gradmend` is the command line."""

from gradmend.cli import main

if __name__ == "__main__":
    main()
