"""How good a model is: distances to held-out pictures, retrieval by a judge, and a report.

Import the module you need; importing this package alone loads nothing heavy.
"""
