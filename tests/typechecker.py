"""The checker behind the import hook of `conftest.py`; like static ones it takes an int where a float is asked for."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
