"""Helpers that know no model: files, devices, progress bars, contact sheets, asset packages."""
