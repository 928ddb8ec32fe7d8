/* What the cc1 workload compiles: a library of one file from Debian's libstb-dev, preprocessed when the guest is made. SMALL is for --quick. */
#ifdef SMALL
#define STB_PERLIN_IMPLEMENTATION
#include <stb/stb_perlin.h>
#else
#define STB_HEXWAVE_IMPLEMENTATION
#include <stb/stb_hexwave.h>
#endif
