"""`kivi memory`: the bytes of a cache before there is one."""
