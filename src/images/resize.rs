//! Changing the size of images whose format does that while nobody uses them.

use std::sync::Arc;

use crate::error::Result;
use crate::formats::vhdx;
use crate::images::open::open_file;
use crate::images::{Access, ImageFormat, OpenRequest, format_of, frozen, open};
use crate::io::{File, HostFile, block_on};

/// An image that is resized while nobody uses it, open and locked.
#[derive(Debug)]
pub struct Offline {
    file: Arc<HostFile>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Size of the image below.
    parent_size: Option<u64>,
}

impl Offline {
    /// Opens the image, if its format is one of those: for others, `None`, and their node is to be
    /// asked.
    ///
    /// # Errors
    /// Says what is wrong with the image, or who uses it.
    pub fn open(request: &OpenRequest) -> Result<Option<Offline>> {
        if format_of(request)? != ImageFormat::Vhdx {
            return Ok(None);
        }
        // As it is looked at: complete, with the right parent, with a log that can be replayed.
        let image = open(&OpenRequest { access: Access::Read, ..request.clone() })?;
        let size = image.node.size();
        let parent_size = image.backing.as_ref().map(|below| below.node.size());
        drop(image);
        let (file, _) = open_file(&OpenRequest { access: Access::Write, ..request.clone() })?;
        frozen::check_not_frozen(&file, &request.allow_dirs)?;
        Ok(Some(Offline { file, size, parent_size }))
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        self.file.name()
    }

    /// Gives it another size; durable on return.
    ///
    /// # Errors
    /// Names the file and what is in the way.
    pub fn resize(&self, size: u64) -> Result<()> {
        let file = Arc::clone(&self.file) as Arc<dyn File>;
        block_on(vhdx::resize::resize(&file, size, self.parent_size))
    }
}
