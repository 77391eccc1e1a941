"""`python -m iisan_fast` is the command `iisan-fast`."""

from .cli import main

if __name__ == "__main__":
    main()
