"""Published systems to compare with, one file each; they import model_script, which knows none of them."""
