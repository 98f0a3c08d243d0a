"""Pictures, films and files of a finished or growing scene."""
