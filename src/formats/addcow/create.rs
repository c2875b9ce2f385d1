//! Making an add-cow file.

use super::layout::{Header, file_len};
use crate::error::{Error, Result, ResultExt};
use crate::io::{AlignedBuf, File};
use crate::units::SECTOR_SIZE;

/// Makes an empty file into an add-cow image whose bits are all clear. The image file must be there
/// already, with `size` bytes. What a power cut leaves of a half-made image is not taken for one:
/// the header comes last.
///
/// # Errors
/// Names the file and what is wrong.
pub async fn create(file: &dyn File, header: &Header, size: u64) -> Result<()> {
    let made = async {
        let bytes = header.encode()?;
        if !size.is_multiple_of(SECTOR_SIZE) || size == 0 {
            return Err(Error::invalid(format!(
                "image size of {size} bytes is not a positive multiple of {SECTOR_SIZE}"
            )));
        }
        if file.len()? != 0 {
            return Err(Error::invalid("the file is not empty"));
        }
        file.set_len(file_len(size)).await?;
        file.flush().await?;
        file.write(0, AlignedBuf::from_slice(&bytes, 512).buffers(), false).await?;
        file.flush().await
    };
    made.await.context(|| format!("{}: cannot create the image", file.name()))
}
