/**
 * What loading="lazy" waits for: that an element comes near to what is seen of the page.
 */
const MARGIN = "600px";
const callbacks = new WeakMap();
let observer = null;

/** Calls `callback` once, when `element` is near. */
export function whenNear(element, callback) {
  observer ??= new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        callbacks.get(target)();
      }
    },
    { rootMargin: MARGIN },
  );
  callbacks.set(element, callback);
  observer.observe(element);
}

/** Waits no longer. */
export function stopWaiting(element) {
  observer?.unobserve(element);
}
