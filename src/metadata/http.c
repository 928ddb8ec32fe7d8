/*
 * A guest's requests (RFC 9112), one at a time out of what a connection has sent: GET of the data, PUT of /latest/api/token for a session token. Answers as clients of micro VMs'
 * metadata and of EC2's know them, the latter's header names included.
 *
 * The head of a request must fit what net/server keeps of a connection; a body is passed over. Nothing is kept between requests.
 * Threading: any thread; the server's is the machine's loop.
 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "metadata/metadata_priv.h"

#define TOKEN_PATH "/latest/api/token"
#define TTL_HEADER "X-metadata-token-ttl-seconds"
#define TTL_HEADER_EC2 "X-aws-ec2-metadata-token-ttl-seconds"
#define FORWARDED_HEADER "X-Forwarded-For"
#define BODY_BYTES_MAX 4096u /* of a request; less than a connection's room, so that it can be waited for */
#define TEXT_ROOM 512

enum { PLAIN, JSON };

/* Pieces of the request's text, which is cut up for it. NULL: was not there. */
struct request {
    struct metadata *metadata;
    const char *method, *path;
    const char *token, *ttl, *ttl_name;
    bool forwarded, json, http_1_0, head_only, close;
    size_t body_bytes;
    struct net_reply *reply;
};

/* ---- answers ---- */

static void answer(struct request *request, unsigned status, int type, const char *extra, const char *body)
{
    static const struct {
        unsigned status;
        const char *reason;
    } reasons[] = {{200, "OK"},       {400, "Bad Request"},         {401, "Unauthorized"}, {404, "Not Found"}, {405, "Method Not Allowed"}, {413, "Content Too Large"},
                   {431, "Request Header Fields Too Large"}, {500, "Internal Server Error"}, {501, "Not Implemented"}, {505, "HTTP Version Not Supported"}};
    const char *reason = "";
    char *text;
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == status)
            reason = reasons[i].reason;
    int length = asprintf(&text, "HTTP/1.%c %u %s\r\nServer: Doppel\r\nConnection: %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n%s\r\n%s", request->http_1_0 ? '0' : '1', status, reason,
                          request->close ? "close" : "keep-alive", type == JSON ? "application/json" : "text/plain", strlen(body), extra, request->head_only ? "" : body);
    *request->reply = (struct net_reply){.data = length < 0 ? NULL : text, .size_bytes = length < 0 ? 0 : (size_t)length, .close = request->close};
}

static void answer_text(struct request *request, unsigned status, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void answer_text(struct request *request, unsigned status, const char *format, ...)
{
    char text[TEXT_ROOM];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    answer(request, status, PLAIN, status == 405 ? "Allow: GET, PUT\r\n" : "", text);
}

static void answer_not_found(struct request *request)
{
    answer_text(request, 404, "Resource not found: %.400s.", request->path);
}

static void get_data(struct request *request)
{
    char *text = NULL;
    switch (metadata_text(request->metadata, request->path, request->json, &text)) {
    case 0:
        answer(request, 200, request->json ? JSON : PLAIN, "", text);
        break;
    case -ENOENT:
        answer_not_found(request);
        break;
    case -EDOM:
        answer_text(request, 501, "Cannot retrieve value. The value has an unsupported type.");
        break;
    default:
        answer_text(request, 500, "Out of memory.");
    }
    free(text);
}

static void serve_get(struct request *request)
{
    struct metadata *metadata = request->metadata;
    bool valid = request->token && token_is_valid(metadata->key, request->token);
    pthread_mutex_lock(&metadata->lock);
    struct metadata_settings settings = metadata->settings;
    metadata->counters.rx_no_token += !request->token;
    metadata->counters.rx_invalid_token += request->token && !valid;
    pthread_mutex_unlock(&metadata->lock);
    request->json &= !settings.imds_compatible;
    if (valid || !settings.version_2)
        get_data(request);
    else if (request->token)
        answer_text(request, 401, "MMDS token not valid.");
    else
        answer_text(request, 401, "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.");
}

/* Compares as find() of the store sees paths: empty segments do not count. */
static bool is_token_path(const char *path)
{
    const char *wanted = TOKEN_PATH;
    while (*path && *wanted) {
        if (*path != *wanted)
            return false;
        path += *path == '/' ? strspn(path, "/") : 1;
        wanted++;
    }
    return !*wanted && !path[strspn(path, "/")];
}

static void serve_put(struct request *request)
{
    char token[TOKEN_ROOM], extra[TEXT_ROOM];
    if (request->forwarded) { /* it went through a proxy, which must not get at tokens */
        answer_text(request, 400, "Invalid header. Reason: Unsupported header name. Key: " FORWARDED_HEADER);
        return;
    }
    if (!is_token_path(request->path)) {
        answer_not_found(request);
        return;
    }
    if (!request->ttl) {
        answer_text(request, 400, "Token time to live value not found. Use `" TTL_HEADER "` or `" TTL_HEADER_EC2 "` header to specify the token's lifetime.");
        return;
    }
    size_t digits = strspn(request->ttl, "0123456789");
    unsigned long long ttl = strtoull(request->ttl, NULL, 10);
    if (digits == 0 || digits > 10 || request->ttl[digits] || ttl > UINT32_MAX)
        answer_text(request, 400, "Invalid header. Reason: Invalid value. Key:%s; Value:%.100s", request->ttl_name, request->ttl);
    else if (ttl < 1 || ttl > TOKEN_TTL_MAX_S)
        answer_text(request, 400, "Invalid time to live value provided for token: %llu. Please provide a value between 1 and %u.", ttl, TOKEN_TTL_MAX_S);
    else if (!token_make(request->metadata->key, (uint32_t)ttl, token))
        answer_text(request, 500, "Out of memory.");
    else {
        snprintf(extra, sizeof extra, "%s: %llu\r\n", request->ttl_name, ttl);
        answer(request, 200, PLAIN, extra, token);
    }
}

/* ---- the head ---- */

static bool list_has(const char *list, const char *word)
{
    size_t length = strlen(word);
    for (; *list; list += strcspn(list, ","), list += *list == ',') {
        list += strspn(list, " \t");
        if (strncasecmp(list, word, length) == 0 && strchr(",; \t", list[length]))
            return true;
    }
    return false;
}

/* 0, or the status with which the request is refused. */
static unsigned take_header(struct request *request, const char *name, const char *value)
{
    if (strcasecmp(name, "X-metadata-token") == 0 || strcasecmp(name, "X-aws-ec2-metadata-token") == 0) {
        request->token = value;
    } else if (strcasecmp(name, TTL_HEADER) == 0 || strcasecmp(name, TTL_HEADER_EC2) == 0) {
        request->ttl = value;
        request->ttl_name = strcasecmp(name, TTL_HEADER) == 0 ? TTL_HEADER : TTL_HEADER_EC2;
    } else if (strcasecmp(name, FORWARDED_HEADER) == 0) {
        request->forwarded = true;
    } else if (strcasecmp(name, "Accept") == 0) {
        request->json |= list_has(value, "application/json");
    } else if (strcasecmp(name, "Connection") == 0) {
        request->close = list_has(value, "close") || (request->close && !list_has(value, "keep-alive"));
    } else if (strcasecmp(name, "Content-Length") == 0) {
        size_t digits = strspn(value, "0123456789"), bytes = strtoull(value, NULL, 10);
        if (digits == 0 || value[digits] || (request->body_bytes && request->body_bytes != bytes))
            return 400;
        if (digits > 9 || bytes > BODY_BYTES_MAX)
            return 413;
        request->body_bytes = bytes;
    } else if (strcasecmp(name, "Transfer-Encoding") == 0) {
        return 501;
    }
    return 0;
}

/* "GET /path?query HTTP/1.1", or with "http://host" in front of the path. */
static unsigned take_request_line(struct request *request, char *line)
{
    char *path = strchr(line, ' '), *version = path ? strchr(path + 1, ' ') : NULL;
    if (!version || path == line || version == path + 1)
        return 400;
    *path++ = '\0';
    *version++ = '\0';
    request->http_1_0 = request->close = strcmp(version, "HTTP/1.0") == 0;
    if (!request->http_1_0 && strcmp(version, "HTTP/1.1") != 0)
        return strncmp(version, "HTTP/", 5) == 0 ? 505 : 400;
    bool absolute = strncasecmp(path, "http://", 7) == 0;
    path += absolute ? 7 + strcspn(path + 7, "/?#") : 0;
    path[strcspn(path, "?#")] = '\0';
    request->method = line;
    request->path = absolute && !*path ? "/" : path;
    request->head_only = strcmp(line, "HEAD") == 0;
    return *request->path == '/' ? 0 : 400;
}

/* Cuts the head into lines, without what ends them. NULL: there are no more. */
static char *next_line(char **rest)
{
    char *line = *rest, *end = strchr(line, '\n');
    if (!end)
        return NULL;
    *rest = end + 1;
    *end = '\0';
    if (end > line && end[-1] == '\r')
        end[-1] = '\0';
    return line;
}

static unsigned take_head(struct request *request, char *head)
{
    char *rest = head, *line = next_line(&rest);
    unsigned status = line ? take_request_line(request, line) : 400;
    while (status == 0 && (line = next_line(&rest)) && *line) {
        size_t name = strcspn(line, ": \t");
        if (name == 0 || line[name] != ':')
            return 400;
        line[name] = '\0';
        char *value = line + name + 1 + strspn(line + name + 1, " \t");
        size_t length = strlen(value);
        while (length && (value[length - 1] == ' ' || value[length - 1] == '\t'))
            value[--length] = '\0';
        status = take_header(request, line, value);
    }
    return status;
}

/* The bytes of the head with the empty line that ends it; 0: it is not all there. */
static size_t head_length(const char *data, size_t size_bytes)
{
    const char *at = data, *end;
    while ((end = memchr(at, '\n', size_bytes - (size_t)(at - data)))) {
        size_t left = size_bytes - (size_t)(end + 1 - data);
        if (left && end[1] == '\n')
            return (size_t)(end + 2 - data);
        if (left >= 2 && end[1] == '\r' && end[2] == '\n')
            return (size_t)(end + 3 - data);
        at = end + 1;
    }
    return 0;
}

static void dispatch(struct request *request)
{
    if (strcmp(request->method, "GET") == 0)
        serve_get(request);
    else if (strcmp(request->method, "PUT") == 0)
        serve_put(request);
    else
        answer_text(request, 405, "Not allowed HTTP method.");
}

static void refuse(struct request *request, unsigned status)
{
    request->close = true; /* where the next one would begin is not known */
    answer_text(request, status, status == 431 ? "The request's head is too large." : status == 413 ? "The request's body is too large." : status == 501 ? "Transfer codings are not supported."
                                 : status == 505 ? "Only HTTP/1.0 and HTTP/1.1 are supported." : "Invalid request.");
}

size_t metadata_serve(void *metadata, const char *data, size_t size_bytes, bool full, struct net_reply *reply)
{
    struct request request = {.metadata = metadata, .reply = reply};
    size_t empty = 0;
    while (empty < size_bytes && (data[empty] == '\r' || data[empty] == '\n'))
        empty++; /* RFC 9112, section 2.2 */
    size_t head_bytes = head_length(data + empty, size_bytes - empty);
    if (head_bytes == 0) {
        if (!full)
            return 0;
        refuse(&request, 431);
        return size_bytes;
    }
    char *head = strndup(data + empty, head_bytes);
    if (!head)
        return size_bytes; /* no reply: a reset */
    unsigned status = strlen(head) == head_bytes ? take_head(&request, head) : 400;
    size_t all = empty + head_bytes + request.body_bytes;
    if (status == 0 && all > size_bytes) {
        if (full)
            status = 413;
        else
            all = 0;
    }
    if (status) {
        refuse(&request, status);
        all = size_bytes;
    } else if (all) {
        dispatch(&request);
    }
    free(head);
    return all;
}
