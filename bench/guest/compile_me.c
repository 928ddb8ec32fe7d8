/* What the cc1 workload compiles: a library of one file from Debian's libstb-dev, preprocessed when the guest is made. SMALL is for --quick. */
#ifdef SMALL
#define STB_DXT_IMPLEMENTATION
#include <stb/stb_dxt.h>
#else
#define STB_SPRINTF_IMPLEMENTATION
#include <stb/stb_sprintf.h>
#endif
