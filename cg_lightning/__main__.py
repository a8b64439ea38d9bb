"""``python -m cg_lightning``: the same as the command ``cg-lightning``."""

from cg_lightning.app.main import main

if __name__ == "__main__":
    main()
