"""What the command lines share: flags from dataclasses, the table of the options, and where models are kept."""
