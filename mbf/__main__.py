"""``python -m mbf``: the command line, as ``torchrun -m mbf`` and ``accelerate launch -m mbf`` start it."""

from mbf.cli import main

if __name__ == "__main__":
    main()
