"""`python -m p2ptrain` is the same command as `p2ptrain`."""

from p2ptrain.cli.main import main

if __name__ == "__main__":
    main()
