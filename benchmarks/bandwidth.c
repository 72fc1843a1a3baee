/* How fast this machine reads memory: all threads over one large block, nothing kept but an exclusive or. */
#include <stdint.h>
#include <stdlib.h>

typedef uint64_t words __attribute__((vector_size(32)));

uint64_t read_all(const words *block, int64_t n) {
    words total = {0};
#pragma omp parallel
    {
        words sums[4] = {{0}};
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n / 4; i++)
            for (int j = 0; j < 4; j++) sums[j] ^= block[4 * i + j];
#pragma omp critical
        total ^= sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    }
    return total[0] ^ total[1] ^ total[2] ^ total[3];
}
