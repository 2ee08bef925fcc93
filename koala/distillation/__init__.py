"""Training: tasks (what is learnt), taps (features compared), EMA, and the loop that runs them.

Import the module you need (`koala.distillation.tasks`, `koala.distillation.loop`); importing this
package alone loads nothing heavy.
"""
