"""Alembic's migrations of the store, oldest first; a database is brought up to date when it is opened."""
