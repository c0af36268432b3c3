/**
 * A stream that cannot be decoded, or an image decoder that cannot be used.
 *
 * `code` is the error's name in section 13 of the specification (magic, truncated, version, checksum, unsupported,
 * field, limit, payload); "model" is an image decoder that is missing or does not fit, "network" a failed download.
 */
export class ClricError extends Error {
  constructor(code, message) {
    super(message);
    this.name = "ClricError";
    this.code = code;
  }
}

export function fail(code, message) {
  throw new ClricError(code, message);
}

/** Fails where a value is over its limit. */
export function atMost(limit, value, name, code = "field") {
  if (value > limit) fail(code, `${name}: ${value}, at most ${limit} allowed`);
}
