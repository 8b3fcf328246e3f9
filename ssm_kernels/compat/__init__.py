"""Other packages' names and signatures on the ops of this one."""
