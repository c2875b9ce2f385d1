//! What the plans of a layer lead to where a range is its backing's.

use std::fmt;
use std::sync::Arc;

use crate::block::Node;
use crate::block::driver::{Driver, Limits, Plan, PlanExtent, Planned};
use crate::error::{Error, Result};
use crate::units::ByteRange;

/// Refuses a backing whose end could not be read: a file opened for direct I/O, as all formats end with
/// whole sectors of theirs.
pub(super) fn check(backing: &Node) -> Result<()> {
    let (size, unit) = (backing.size(), backing.limits().request_alignment);
    if size.is_multiple_of(unit) {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "the backing file of {size} bytes does not end with a sector of {unit} bytes, as direct I/O \
         demands; use --cache writeback (of vublk convert: -T writeback)"
    )))
}

/// A backing with its driver, which plans borrow from. It stays what it is: a layer whose backing
/// changes gets another one ([`Driver::on_backing`]).
pub(super) struct Link {
    node: Node,
    driver: Arc<dyn Driver>,
    /// The node's when `driver` was loaded.
    generation: u64,
    /// The backing's size in bytes.
    size: u64,
    /// What requests to the backing must be multiples of, in bytes.
    unit: u64,
    /// Whether memory that suits the layer above suits the backing.
    is_aligned: bool,
}

impl Link {
    /// A way to `node` for a layer with these limits.
    pub(super) fn new(node: Node, above: &Limits) -> Link {
        // Before the driver: if that is replaced in between, the generation is already old.
        let generation = node.generation();
        let driver = node.driver();
        let limits = node.limits();
        Link {
            driver,
            generation,
            size: limits.size,
            unit: limits.request_alignment,
            is_aligned: limits.memory_alignment <= above.memory_alignment,
            node,
        }
    }

    /// Whether the node has another driver by now.
    pub(super) fn is_behind(&self) -> bool {
        self.node.generation() != self.generation
    }

    /// Plans a read: zeros where the backing ends.
    pub(super) fn plan_read<'a>(&'a self, range: ByteRange, plan: &mut Plan<'a>) -> Planned {
        // The layer above may take less, and what suits it may be cut into runs that do not.
        if !self.is_aligned || !range.is_aligned(self.unit) || self.is_behind() {
            return Planned::NotNow;
        }
        let inside = range.intersect(&ByteRange { offset: 0, len: self.size });
        if !inside.is_empty() && plan.read_through(&*self.driver, inside) == Planned::NotNow {
            return Planned::NotNow;
        }
        if inside.len < range.len {
            plan.push(PlanExtent::Zero { len: range.len - inside.len });
        }
        Planned::Ready
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({})", self.node.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Gate, NodeOptions};
    use crate::formats::raw::Raw;
    use crate::io::{File, block_on, sim::SimFile};

    #[test]
    fn what_a_backing_has_grown_by_is_not_planned_as_zeros() {
        let file = SimFile::from_bytes("base", vec![1; 4096]);
        let raw = Arc::new(Raw::open(Arc::new(file.clone()), false).unwrap());
        let node = Node::new(raw, NodeOptions::default());
        let link = Link::new(node.clone(), &node.limits());
        let beyond = ByteRange { offset: 4096, len: 512 };
        let quiesced = Gate::new().quiesce();
        node.refresh(&quiesced).unwrap();
        assert_eq!(link.plan_read(beyond, &mut Plan::default()), Planned::Ready, "it is as it was");
        block_on(file.set_len(8192)).unwrap();
        node.refresh(&quiesced).unwrap();
        assert_eq!(link.plan_read(beyond, &mut Plan::default()), Planned::NotNow);
    }

    #[test]
    fn a_part_of_a_unit_of_the_backing_is_not_planned() {
        let units = crate::io::Alignment { request: 4096, memory: 512 };
        let file = SimFile::with_alignment("base", vec![1; 4096], units);
        let raw = Arc::new(Raw::open(Arc::new(file), false).unwrap());
        let node = Node::new(raw, NodeOptions::default());
        let link = Link::new(node.clone(), &node.limits());
        let planned = |len| link.plan_read(ByteRange { offset: 4096, len }, &mut Plan::default());
        assert_eq!((planned(4096), planned(512)), (Planned::Ready, Planned::NotNow));
    }
}
