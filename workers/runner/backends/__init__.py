"""How is a model brought into memory, and which passes does a backend attach to it?"""
