"""What is searched, and what a trial is worth; plain logic that a serial loop could run.

distributions.py  "loguniform(0.05, 2)" and its like
spaces.py         which names a recipe may search, and the setting a point of a space stands for
defaults.py       the ready-made space of each method
coefficients.py   coefficients by layer group as evidence that a merge reads
objectives.py     what a trial is judged by, and which way is better
measuring.py      a setting in, metrics out: merge (learn first, if the method learns) and measure
ledger.py         one JSON file a trial: the searcher's memory
study.py          Optuna between the ledger and whoever runs trials
starting.py       the points a search begins with
recipes.py        a setting as a runnable merge recipe
"""
