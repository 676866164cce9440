"""The commands of ``trunkline``, one file each, and flags made from settings; may import all of core, in functions."""
