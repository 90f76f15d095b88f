"""Plans for chips that are not here: what a program needs, and what bounds it.

`plan.make_plan` compiles a real program for a slice of TPUs; the parts read the
compiled text (`hlo`, `counts`, `collectives`), the memory (`memory`) and the
speeds of chips (`chips`, `roofline`). `experiments/plan.py` is its script.
"""
