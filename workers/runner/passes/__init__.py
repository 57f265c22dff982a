"""What does each specialization pass change in a model of ours, and how is it known to have taken effect?"""
