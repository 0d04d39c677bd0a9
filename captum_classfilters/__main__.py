"""``python -m captum_classfilters``."""

from captum_classfilters.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
