/**
 * Registered functions: specification, section 11.
 */
import { NETWORKS } from "./registered_networks.js";

const INSTANT = "010808120803080008190804";

/** Architecture descriptions in hexadecimal digits, by number. */
export const FUNCTIONS = {
  1: "05040101010108120803040008090405",
  2: "0701010101010101080208042808040004090405",
  3: "05100101010108120803100010191004",
  4: "05200101010108120803200020192004",
  5: "0701010101010101080208042808100010191015",
  6: "0701010101010101080208042808200020192015",
  7: "05080101010108120803080008190804",
  8: INSTANT,
  9: INSTANT,
  10: INSTANT,
  11: INSTANT,
  12: INSTANT,
  13: INSTANT,
  14: INSTANT,
};

/** The networks segment of a function that comes with it, or undefined. */
export function registeredNetworks(number) {
  const text = NETWORKS[number];
  return text && Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
