"""Machinery below the public names; nothing here is part of the API."""
