"""Model evaluation: distances to held-out images, retrieval by a judge, and the report.

Import the module you need; importing this package alone loads nothing heavy.
"""
