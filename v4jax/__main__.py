"""`python -m v4jax` is `v4jax`."""

from v4jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
