/*
 * The option --metadata: the file with the data, and how it is asked for. Threading: none.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "machine/config_priv.h"
#include "metadata/metadata.h"

static int set_property(struct metadata_config *metadata, const char *word, struct error *err)
{
    uint8_t address[4];
    if (strcmp(word, "version=1") == 0 || strcmp(word, "version=2") == 0) {
        metadata->version_2 = word[8] == '2';
        return 0;
    }
    if (strcmp(word, "imds") == 0) {
        metadata->imds_compatible = true;
        return 0;
    }
    if (strncmp(word, "address=", 8) == 0) {
        if (!metadata_parse_address(word + 8, address))
            return error_set(err, -EINVAL, "--metadata: %s is not an address from 169.254.1.0 to 169.254.254.255", word);
        return config_replace(&metadata->address, word + 8, err);
    }
    return error_set(err, -EINVAL, "--metadata: unknown property \"%s\"; write FILE[,version=1|2][,address=A][,imds] (a comma in a path is written twice)", word);
}

int config_set_metadata(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    struct metadata_config metadata = {.present = true, .everywhere = true};
    char *text = strdup(value);
    if (!text)
        return error_set(err, -ENOMEM, "out of memory");
    char *rest = config_cut_path(text);
    int r = *text ? config_replace(&metadata.path, text, err) : error_set(err, -EINVAL, "--metadata: no file; write FILE[,version=1|2][,address=A][,imds]");
    for (char *word; r == 0 && (word = rest);) {
        rest = config_cut_path(word);
        r = set_property(&metadata, word, err);
    }
    free(r ? metadata.path : config->metadata.path);
    free(r ? metadata.address : config->metadata.address);
    if (r == 0)
        config->metadata = metadata;
    free(text);
    return r;
}
