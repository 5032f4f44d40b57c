"""What commands and scripts are made of: options, errors in one line, tables. The commands are in ``commands``."""
