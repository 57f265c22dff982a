"""Where do the keys and values of past tokens live when they do not stay in memory?"""
