"""What do we remember? Everything durable, in one SQL database; rows never leave, core dataclasses and views do."""
