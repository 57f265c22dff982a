"""How do rows of any length go through a model together, without padding? As one sequence, the pack, in which each minds its
own.
"""
