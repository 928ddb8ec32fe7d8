/* float SEED: x87, SSE and vector arithmetic, rounding modes, exceptions' flags, conversions, special values; libm. Sums of bits, so any difference shows. */
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t seed;

static uint64_t random64(void)
{
    uint64_t value = 0;
    for (int i = 0; i < 4; i++) {
        seed = seed * 69069 + 1;
        value = value << 16 | seed >> 16;
    }
    return value;
}

static double random_double(int special)
{
    static const double odd[] = {0.0, -0.0, INFINITY, -INFINITY, 1e-310, -1e-310, 4.9e-324, 1.7e308, 0.5, -1.5, 9.2233720368547758e18, 4294967296.0, 3.0};
    uint64_t bits = random64();
    double value;
    memcpy(&value, &bits, 8);
    return special && bits % 4 == 0 ? odd[bits / 4 % 13] : isnan(value) ? 1.0 : value;
}

static uint64_t hash;

static void add(const void *data, size_t size)
{
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3u;
}

static void add_double(double value)
{
    if (isnan(value))
        value = 777;           /* signs of results that are no number differ between instruction sets */
    add(&value, 8);
}

static void arithmetic(int mode)
{
    fesetround(mode);
    for (int i = 0; i < 60000; i++) {
        volatile double a = random_double(1), b = random_double(1);
        volatile float c = (float)a, d = (float)b;
        feclearexcept(FE_ALL_EXCEPT);
        add_double(a + b);
        add_double(a * b);
        add_double(a / b);
        add_double(sqrt(fabs(a)));
        add_double(c + d);
        add_double(c * d);
        add_double(rint(b));
        volatile long double x = a, y = b;
        long double z = x * y + x / (y + 1);
        if (isnan(z))
            z = 777;
        add(&z, 10);
        int flags = fetestexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW | FE_UNDERFLOW);
        add(&flags, sizeof(flags));
        if (fabs(a) < 1e9) {
            int32_t whole = (int32_t)a;
            int64_t wide = llrint(a);
            add(&whole, 4);
            add(&wide, 8);
        }
    }
    fesetround(FE_TONEAREST);
    printf("%016llx\n", (unsigned long long)hash);
}

static void library(void)
{
    for (int i = 0; i < 60000; i++) {
        double a = (double)(int64_t)random64() / 1e16;
        add_double(sin(a) + cos(a * 0.5));
        add_double(exp(a / 100) + log(fabs(a) + 1) + pow(fabs(a) + 0.1, 0.3));
        add_double(atan2(a, 3) + tanh(a / 500) + cbrt(a) + fmod(a, 7) + hypot(a, 2));
        long double l = sinl(a) + expl((long double)a / 1000);
        add(&l, 10);
        char text[64];
        snprintf(text, sizeof(text), "%.17g %a %.3Lf", a, a, l);
        add(text, strlen(text));
        add_double(strtod(text, NULL));
    }
    printf("%016llx\n", (unsigned long long)hash);
}

/* Loops that compilers make vectors of. */
static void vectors(void)
{
    static float f[4096], g[4096];
    static int32_t n[4096];
    static uint8_t c[4096];
    for (int i = 0; i < 4096; i++) {
        f[i] = (float)(random64() % 1000) / 8;
        n[i] = (int32_t)random64();
        c[i] = (uint8_t)random64();
    }
    for (int round = 0; round < 1000; round++) {
        for (int i = 0; i < 4096; i++)
            g[i] = f[i] * 0.5f + (float)round;
        for (int i = 0; i < 4096; i++)
            n[i] = n[i] * 31 + (n[i] >> 7);
        for (int i = 0; i < 4096; i++)
            c[i] = (uint8_t)(c[i] > 100 ? c[i] - 3 : c[i] + 77);
        for (int i = 1; i < 4096; i++)
            f[i] = g[i - 1] > 100 ? g[i] / 3 : f[i] + 1;
    }
    add(f, sizeof(f));
    add(n, sizeof(n));
    add(c, sizeof(c));
    printf("%016llx\n", (unsigned long long)hash);
}

int main(int argc, char **argv)
{
    seed = argc > 1 ? (uint32_t)atoi(argv[1]) : 0;
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    for (int i = 0; i < 4; i++)
        arithmetic(modes[i]);
    library();
    vectors();
    return 0;
}
