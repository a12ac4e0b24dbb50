"""The command `dancegrpo-fast`, one file a command; each is loaded when it is called, and nothing else imports them."""

from .main import main as main
