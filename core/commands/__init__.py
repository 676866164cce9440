"""The commands of ``trunkline``, one file each, and the flags made from settings; may import all of core, lazily."""
