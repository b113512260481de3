"""The scripts; in an installation they are the package `ramp_jax.launch`, behind the commands `ramp-...`."""
