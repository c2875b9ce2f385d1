//! Events: what happened, told to every client that has ended its negotiation.
//!
//! Any thread may emit one; it is stamped with the time and left for the control thread. Events
//! that a guest can cause at any rate have a limit, as in QEMU: the first one goes out at once, and
//! for a second after that only the latest is kept, which goes out at the end of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::inbox::{Inbox, Note};
use super::job_events;
use super::qapi::Object;
use super::schema::Schema;

/// The time in which one event of a kind with a limit goes out.
const LIMIT: Duration = Duration::from_secs(1);

/// An event; its members are its data.
pub trait Event: Object {
    /// Its name on the wire.
    const NAME: &'static str;

    /// For events with a limit: what has one of its own, for instance the device.
    fn limited_by(&self) -> Option<String> {
        None
    }
}

/// An entry of the table of events, for the schema.
#[derive(Clone, Copy, Debug)]
pub struct EventKind {
    name: &'static str,
    data: fn(&mut Schema) -> String,
}

impl EventKind {
    const fn of<E: Event>() -> EventKind {
        EventKind { name: E::NAME, data: E::describe }
    }

    /// The schema's entry.
    pub(super) fn describe(&self, schema: &mut Schema) -> Value {
        json!({"name": self.name, "meta-type": "event", "arg-type": (self.data)(schema)})
    }
}

/// Every event there is.
pub(super) const EVENTS: &[EventKind] = &[
    EventKind::of::<super::block_events::BlockExportDeleted>(),
    EventKind::of::<super::block_events::BlockIoError>(),
    EventKind::of::<job_events::BlockJobCancelled>(),
    EventKind::of::<job_events::BlockJobCompleted>(),
    EventKind::of::<job_events::BlockJobError>(),
    EventKind::of::<job_events::BlockJobPending>(),
    EventKind::of::<job_events::BlockJobReady>(),
    EventKind::of::<job_events::JobStatusChange>(),
    EventKind::of::<EventsLost>(),
];

crate::qapi! {
    /// Events for this client were dropped because it did not read. It should query what it needs
    /// to know.
    pub struct EventsLost {
        /// How many.
        pub count: u64,
    }
}

impl Event for EventsLost {
    const NAME: &'static str = "X_VUBLK_EVENTS_LOST";
}

/// Where events are emitted. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events {
    inbox: Arc<Inbox>,
    /// Kinds that have a limit and went out less than [`LIMIT`] ago, by name and what limits them.
    limited: Arc<Mutex<BTreeMap<(&'static str, String), Limited>>>,
}

#[derive(Debug)]
struct Limited {
    /// When the next may go out.
    until: Instant,
    /// The latest that may not yet, stamped when it happened.
    waiting: Option<String>,
}

impl Events {
    pub(super) fn new(inbox: Arc<Inbox>) -> Events {
        Events { inbox, limited: Arc::default() }
    }

    /// Tells all clients.
    pub fn emit<E: Event>(&self, event: &E) {
        if !self.inbox.is_open() {
            return;
        }
        let line = line(event);
        let Some(key) = event.limited_by() else {
            return self.inbox.leave(Note::Event(line));
        };
        let mut limited = self.limited.lock().unwrap();
        match limited.get_mut(&(E::NAME, key.clone())) {
            Some(entry) => entry.waiting = Some(line),
            None => {
                let entry = Limited { until: Instant::now() + LIMIT, waiting: None };
                limited.insert((E::NAME, key), entry);
                // This wakes the control thread, which then finds the new limit, too.
                self.inbox.leave(Note::Event(line));
            }
        }
    }

    /// Lets go what has waited for its limit. Returns when to look again, if at all.
    pub(super) fn release(&self, now: Instant) -> Option<Instant> {
        let mut limited = self.limited.lock().unwrap();
        limited.retain(|_, entry| {
            if entry.until > now {
                return true;
            }
            let Some(line) = entry.waiting.take() else { return false };
            self.inbox.leave(Note::Event(line));
            entry.until = now + LIMIT;
            true
        });
        limited.values().map(|entry| entry.until).min()
    }
}

/// An event as it goes over the wire.
pub(super) fn line<E: Event>(event: &E) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "event": E::NAME,
        "data": event.to_value(),
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::qapi! {
        /// Test.
        pub struct Failed {
            /// Of what.
            pub device: String,
            /// Which.
            pub count: u64,
        }
    }

    impl Event for Failed {
        const NAME: &'static str = "FAILED";

        fn limited_by(&self) -> Option<String> {
            Some(self.device.clone())
        }
    }

    fn taken(inbox: &Inbox) -> Vec<Value> {
        let data = |note| match note {
            Note::Event(line) => serde_json::from_str::<Value>(&line).unwrap()["data"].clone(),
            other => panic!("{other:?}"),
        };
        inbox.take().into_iter().map(data).collect()
    }

    #[test]
    fn the_first_and_the_latest_go_out() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let events = Events::new(Arc::clone(&inbox));
        let emit = |device: &str, count| events.emit(&Failed { device: device.into(), count });
        emit("a", 0);
        inbox.set_open(true);
        for count in 1..100 {
            emit("a", count);
        }
        emit("b", 1);
        let of = |device: &str, count: u64| json!({"device": device, "count": count});
        assert_eq!(taken(&inbox), [of("a", 1), of("b", 1)], "and none from before it was open");
        let now = Instant::now();
        assert!(events.release(now).is_some());
        assert_eq!(taken(&inbox), [] as [Value; 0]);
        let later = now + 2 * LIMIT;
        assert_eq!(events.release(later), Some(later + LIMIT), "b is forgotten, a goes on");
        assert_eq!(taken(&inbox), [of("a", 99)]);
        assert_eq!(events.release(later + LIMIT), None, "no timer without need");
    }
}
