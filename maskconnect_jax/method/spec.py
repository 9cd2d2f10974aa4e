"""What can be chosen of a network's wiring, by name.

The config's fields take the same names; see `config.default`.
"""

RULES = ('learned', 'fixed_prev', 'fixed_random', 'fixed_all')
LEVELS = ('block', 'branch')
GRADIENTS = ('all', 'drawn', 'centered', 'normalized')
SCALES = ('mean', 'sum')  # of the K terms
ADAPTERS = ('pool', 'projection', 'same_stage')
IDENTITIES = ('1/K', '1/C')  # s, at the branch level
REMATS = ('none', 'block')

# Of the network itself.
VERSIONS = ('1', '2')
DTYPES = ('float32', 'bfloat16')
PRECISIONS = ('default', 'high', 'highest')
