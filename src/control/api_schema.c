/* Checking and completing bodies (api_schema.h). The tables are in api_definitions.c. */
#include "control/api_schema.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

static const char *const type_names[] = {
    [FIELD_STRING] = "a string",        [FIELD_BOOLEAN] = "a boolean",  [FIELD_INTEGER] = "an integer",          [FIELD_WORD] = "a string",
    [FIELD_OBJECT] = "an object",       [FIELD_OBJECTS] = "a sequence", [FIELD_STRINGS] = "a sequence of strings", [FIELD_TEXTS] = "an object of strings",
};

static void append(char *text, size_t room, const char *more)
{
    strncat(text, more, room - strlen(text) - 1);
}

static int wrong_type(const struct field *field, const json_t *value, struct error *err)
{
    static const char *const json_names[] = {"object", "sequence", "string", "integer", "floating point", "boolean `true`", "boolean `false`", "null"};
    return error_set(err, -EINVAL, "invalid type: %s, expected %s for `%s`", json_names[json_typeof(value)], type_names[field->type], field->name);
}

static int unknown_field(const struct field *fields, const char *name, struct error *err)
{
    char list[400] = "";
    for (const struct field *field = fields; field->name; field++) {
        append(list, sizeof list, field == fields ? "`" : ", `");
        append(list, sizeof list, field->name);
        append(list, sizeof list, "`");
    }
    return error_set(err, -EINVAL, "unknown field `%.60s`, expected %s%s", name, fields[0].name && fields[1].name ? "one of " : "", list);
}

static int check_word(const struct field *field, const json_t *value, struct error *err)
{
    char list[200] = "";
    const char *text = json_string_value(value);
    if (!text)
        return wrong_type(field, value, err);
    for (unsigned i = 0; field->words[i]; i++) {
        if ((field->any_case ? strcasecmp : strcmp)(field->words[i], text) == 0)
            return 0;
        append(list, sizeof list, i ? ", `" : "`");
        append(list, sizeof list, field->words[i]);
        append(list, sizeof list, "`");
    }
    return error_set(err, -EINVAL, "unknown variant `%.60s`, expected one of %s", text, list);
}

static int check_integer(const struct field *field, const json_t *value, struct error *err)
{
    if (!json_is_integer(value))
        return wrong_type(field, value, err);
    int64_t number = json_integer_value(value), max = field->min || field->max ? field->max : INT64_MAX;
    if (number < field->min || number > max)
        return error_set(err, -EINVAL, "invalid value: integer `%lld`, expected `%s` from %lld to %lld", (long long)number, field->name,
                         (long long)field->min, (long long)max);
    return 0;
}

static int check_strings(const struct field *field, const json_t *value, struct error *err)
{
    size_t index;
    const char *key;
    json_t *element;
    if (field->type == FIELD_STRINGS ? !json_is_array(value) : !json_is_object(value))
        return wrong_type(field, value, err);
    if (field->type == FIELD_STRINGS) {
        json_array_foreach(value, index, element)
            if (!json_is_string(element))
                return wrong_type(field, element, err);
    } else {
        json_object_foreach((json_t *)value, key, element)
            if (!json_is_string(element))
                return wrong_type(field, element, err);
    }
    return 0;
}

static int check_objects(const struct field *field, const json_t *value, struct error *err)
{
    size_t index;
    json_t *element;
    int r = json_is_array(value) ? 0 : wrong_type(field, value, err);
    if (r)
        return r;
    json_array_foreach(value, index, element)
    {
        r = json_is_object(element) ? schema_check(field->fields, element, err) : wrong_type(field, element, err);
        if (r)
            return r;
    }
    return 0;
}

static int check_value(const struct field *field, const json_t *value, struct error *err)
{
    switch (field->type) {
    case FIELD_STRING:
        return json_is_string(value) ? 0 : wrong_type(field, value, err);
    case FIELD_BOOLEAN:
        return json_is_boolean(value) ? 0 : wrong_type(field, value, err);
    case FIELD_INTEGER:
        return check_integer(field, value, err);
    case FIELD_WORD:
        return check_word(field, value, err);
    case FIELD_OBJECT:
        return json_is_object(value) ? schema_check(field->fields, value, err) : wrong_type(field, value, err);
    case FIELD_OBJECTS:
        return check_objects(field, value, err);
    default:
        return check_strings(field, value, err);
    }
}

static const struct field *find(const struct field *fields, const char *name)
{
    for (; fields->name; fields++)
        if (strcmp(fields->name, name) == 0)
            return fields;
    return NULL;
}

int schema_check(const struct field *fields, const json_t *object, struct error *err)
{
    const char *name;
    json_t *value;
    if (!json_is_object(object))
        return error_set(err, -EINVAL, "invalid type: expected an object");
    json_object_foreach((json_t *)object, name, value)
    {
        const struct field *field = find(fields, name);
        if (!field)
            return unknown_field(fields, name, err);
        int r = json_is_null(value) && !field->required ? 0 : check_value(field, value, err);
        if (r)
            return r;
    }
    for (; fields->name; fields++)
        if (fields->required && !json_object_get(object, fields->name))
            return error_set(err, -EINVAL, "missing field `%s`", fields->name);
    return 0;
}

static json_t *complete_value(const struct field *field, const json_t *value)
{
    if (!value || json_is_null(value))
        return field->initial ? json_loads(field->initial, JSON_DECODE_ANY, NULL) : json_null();
    if (field->type == FIELD_OBJECT)
        return schema_complete(field->fields, value);
    if (field->type == FIELD_WORD) /* as the description spells it */
        for (unsigned i = 0; field->words[i]; i++)
            if (strcasecmp(field->words[i], json_string_value(value)) == 0)
                return json_string(field->words[i]);
    if (field->type != FIELD_OBJECTS)
        return json_deep_copy(value);
    json_t *array = json_array(), *element;
    size_t index;
    json_array_foreach(value, index, element)
        json_array_append_new(array, schema_complete(field->fields, element));
    return array;
}

json_t *schema_complete(const struct field *fields, const json_t *object)
{
    json_t *complete = json_object();
    for (const struct field *field = fields; complete && field->name; field++) {
        const json_t *value = json_object_get(object, field->name);
        if (field->absent && (!value || json_is_null(value)))
            continue;
        if (json_object_set_new(complete, field->name, complete_value(field, value))) {
            json_decref(complete);
            return NULL;
        }
    }
    return complete;
}
