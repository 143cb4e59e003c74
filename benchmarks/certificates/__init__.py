"""Checks the false rate of certificates, over many redraws of everything."""
