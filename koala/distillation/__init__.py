"""Training: tasks (named losses), taps (features compared), EMA, and the training loop.

Import the module you need (`koala.distillation.tasks`, `koala.distillation.loop`). Importing this
package alone is cheap.
"""
